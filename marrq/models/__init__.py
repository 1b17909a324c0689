"""Float models, and what marrq reads out of them: weights, preprocessing, images, blocks."""
