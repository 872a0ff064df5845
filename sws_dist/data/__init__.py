"""Turn image files into batches.

A ``Manifest`` lists the images of a split, ``TrainOrder`` orders them, a ``Recipe`` draws what is done to each, DALI
decodes and augments them, and a ``Loader`` yields batches. Mixing and erasing follow on the training device.
"""
