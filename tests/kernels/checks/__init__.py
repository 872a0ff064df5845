"""Inputs and checks of each operator, which tests/kernels/test_<operator>.py and tests/gpu/test_<operator>.py share."""
