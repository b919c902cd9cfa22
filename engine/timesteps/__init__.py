"""Which noise levels a run trains on.

distributions  of t: quantile, CDF, density
sampling       TimestepSampling: musubi's settings -> a distribution for a resolution
weighting      the loss weight at t
stream         TimestepStream: what a run draws, item by item, resumable
preview        the numbers of the preview: density, bins of an actual draw, statistics
figure         those numbers as a picture
"""
