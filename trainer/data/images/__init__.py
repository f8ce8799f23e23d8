"""Data of image runs: pictures with class labels, their complexity, and what a trained tokenizer makes of them."""
