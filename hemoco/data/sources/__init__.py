"""Sources of `pack`: images and annotations in the layouts in which data sets are distributed."""
