"""Foreign checkpoints in and out: X-VLM, CLIP, BERT and timm key maps, without unpickling code.

files.py reads weight files, conversion.py reports and loads, one module per kind maps its names,
build.py makes a whole model of them.
"""
