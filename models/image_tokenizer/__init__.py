"""Image tokenizers: convolutional autoencoders with a codebook or a Gaussian bottleneck, one or several ratios, a
discriminator, and the causal regulariser (CRT).
"""
