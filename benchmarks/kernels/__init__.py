"""Times the kernels, and training with them, against PyTorch on one GPU. See ``__main__`` for the command."""
