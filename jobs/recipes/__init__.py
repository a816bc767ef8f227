"""Complete configs as Python values, one file for each recipe."""
