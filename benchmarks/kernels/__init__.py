"""Time the kernels, and training with them, against PyTorch on one GPU. ``__main__`` has the command.

A module named like an operator has its ``cases(machine, size)``: inputs, providers and the work they must do.
"""
