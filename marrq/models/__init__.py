"""Float models, and what marrq reads from them: weights, preprocessing, labels, images, blocks."""
