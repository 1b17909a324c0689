"""How many images are read, if the user wishes no other number."""

CALIBRATION_IMAGES = 1024
"""Images that calibrate, if there are so many."""
FEW_IMAGES = 256
"""With fewer, low-bit codes fit the images more than the model."""
FEWEST_IMAGES = 2
"""One half of the calibration images judges what the other half gave."""
GALLERY_IMAGES = 4096
"""Most images of `train` that k-NN looks among (marrq/models/images/gallery.py): every model of a
run has to look at each of them."""

PARITY_IMAGES = 256
"""So many images, drawn at random, tell which stage of an export loses."""
