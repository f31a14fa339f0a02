"""The embedded data set: pictures of coloured shapes, and all that is asked about them."""
