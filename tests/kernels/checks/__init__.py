"""Make the inputs and the checks of each operator, for its test_<operator>.py in tests/kernels and in tests/gpu."""
