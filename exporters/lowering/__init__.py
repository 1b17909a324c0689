"""From placeholders to operators: what all flavours share.

    linear.py     `lower`, which replaces each placeholder of a clone of the trace; LinearSlice, the
                  tensors that a placeholder stands for; LinearLowering, which collects its new
                  nodes and constants
    inputs.py     the codes of the input, static or per token
    weights.py    the codes of the weight, widened to int8 from a narrow initializer; second codes
                  of salient columns joined with the first
    lowrank.py    the branch L (R x)

A flavour (exporters/flavors) is a function from a LinearLowering to the value that takes the place
of the placeholder's output. It puts that value together from these files.
"""
