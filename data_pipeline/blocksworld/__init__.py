"""The embedded data set: pictures of coloured shapes with everything a vision-language task asks about them."""
