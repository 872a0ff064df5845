"""What others reached on Fashion-MNIST's 10,000 test images: the table of the data set's README of May 2020.

Debian's package has it as /usr/share/doc/dataset-fashion-mnist/README.md.gz. Its authors say that they have not tested
these results, which others submitted. The package's benchmark/baselines.json holds settings only, and no scores.
"""

from __future__ import annotations

from typing import NamedTuple


class PublishedScore(NamedTuple):
    """One row of the table."""

    classifier: str
    accuracy: float
    """Share of the test images, as submitted."""
    source: str
    """Address of the code; of the submitter where there is none."""


PUBLISHED_SCORES = (
    PublishedScore("2 Conv+pooling", 0.876, "https://gist.github.com/kashif/76792939dd6f473b7404474989cb62a8"),
    PublishedScore(
        "2 Conv+pooling", 0.916, "https://github.com/zalandoresearch/fashion-mnist/blob/master/benchmark/convnet.py"
    ),
    PublishedScore(
        "2 Conv+pooling+ELU activation (PyTorch)",
        0.903,
        "https://github.com/AbhirajHinge/CNN-with-Fashion-MNIST-dataset",
    ),
    PublishedScore("2 Conv", 0.919, "https://github.com/kefth/fashion-mnist"),
    PublishedScore(
        "2 Conv <100K parameters",
        0.925,
        "https://github.com/hardmaru/pytorch_notebooks/blob/master/pytorch_tiny_custom_mnist_adam.ipynb",
    ),
    PublishedScore(
        "2 Conv ~113K parameters",
        0.922,
        "https://github.com/abelusha/MNIST-Fashion-CNN/blob/master/Fashon_MNIST_CNN_using_Keras_10_Runs.ipynb",
    ),
    PublishedScore(
        "2 Conv+3 FC ~1.8M parameters",
        0.932,
        "https://github.com/Xfan1025/Fashion-MNIST/blob/master/fashion-mnist.ipynb",
    ),
    PublishedScore("2 Conv+3 FC ~500K parameters", 0.934, "https://github.com/cmasch/zalando-fashion-mnist"),
    PublishedScore(
        "2 Conv+pooling+BN",
        0.934,
        "https://github.com/khanguyen1207/My-Machine-Learning-Corner/blob/master/Zalando%20MNIST/fashion.ipynb",
    ),
    PublishedScore("2 Conv+2 FC", 0.939, "https://github.com/ashmeet13/FashionMNIST-CNN"),
    PublishedScore("3 Conv+2 FC", 0.907, "https://github.com/cenkbircanoglu/openface/tree/master/fashion_mnist"),
    PublishedScore("3 Conv+pooling+BN", 0.903, "https://github.com/meghanabhange/FashionMNIST-3-Layer-CNN"),
    PublishedScore("3 Conv+pooling+2 FC+dropout", 0.926, "https://github.com/umbertogriffo/Fashion-mnist-cnn-keras"),
    PublishedScore("3 Conv+BN+pooling", 0.921, "https://github.com/GunjanChhablani/CNN-with-FashionMNIST"),
    PublishedScore("5 Conv+BN+pooling", 0.931, "https://gist.github.com/Noumanmufc1/60f00e434f0ce42b6f4826029737490a"),
    PublishedScore(
        "CNN with optional shortcuts, dense-like connectivity", 0.947, "https://github.com/Dezhic/fashion-classifier"
    ),
    PublishedScore(
        "GRU+SVM",
        0.888,
        "https://gist.githubusercontent.com/AFAgarap/92c1c4a5dd771999b0201ec0e7edfee0/raw/828fbda0e466dacb1fad66549e0e3022e1c7263a/gru_svm_zalando.py",
    ),
    PublishedScore(
        "GRU+SVM with dropout",
        0.897,
        "https://gist.githubusercontent.com/AFAgarap/92c1c4a5dd771999b0201ec0e7edfee0/raw/58dbe7cd8b0d83e4386cd6896766113b1a9af096/gru_svm_zalando_dropout.py",
    ),
    PublishedScore("WRN40-4 8.9M params", 0.967, "https://github.com/xternalz/WideResNet-pytorch"),
    PublishedScore("DenseNet-BC 768K params", 0.954, "https://github.com/bamos/densenet.pytorch"),
    PublishedScore("MobileNet", 0.95, "http://kexue.fm/archives/4556/"),
    PublishedScore("ResNet18", 0.949, "https://github.com/kefth/fashion-mnist"),
    PublishedScore(
        "GoogleNet with cross-entropy loss",
        0.937,
        "https://github.com/cenkbircanoglu/openface/tree/master/fashion_mnist",
    ),
    PublishedScore(
        "AlexNet with Triplet loss", 0.899, "https://github.com/cenkbircanoglu/openface/tree/master/fashion_mnist"
    ),
    PublishedScore(
        "SqueezeNet with cyclical learning rate 200 epochs",
        0.9,
        "https://github.com/zalandoresearch/fashion-mnist/files/1263340/squeeze_net_mnist.zip",
    ),
    PublishedScore("Dual path network with wide resnet 28-10", 0.957, "https://github.com/Queequeg92/DualPathNet"),
    PublishedScore("MLP 256-128-100", 0.8833, "https://github.com/heitorrapela/fashion-mnist-mlp"),
    PublishedScore("VGG16 26M parameters", 0.935, "https://github.com/QuantumLiu/fashion-mnist-demo-by-Keras"),
    PublishedScore("WRN-28-10", 0.959, "https://github.com/zhunzhong07/Random-Erasing"),
    PublishedScore("WRN-28-10 + Random Erasing", 0.963, "https://github.com/zhunzhong07/Random-Erasing"),
    PublishedScore("Human Performance", 0.835, ""),
    PublishedScore("Capsule Network 8M parameters", 0.936, "https://github.com/XifengGuo/CapsNet-Fashion-MNIST"),
    PublishedScore("HOG+SVM", 0.926, "https://github.com/subalde/fashion-mnist"),
    PublishedScore("XgBoost", 0.898, "https://github.com/anktplwl91/fashion_mnist.git"),
    PublishedScore("DENSER", 0.953, "https://github.com/fillassuncao/denser-models"),
    PublishedScore("Dyra-Net", 0.906, "https://github.com/disc5/dyra-net"),
    PublishedScore(
        "Google AutoML",
        0.939,
        "https://www.statworx.com/de/blog/a-performance-benchmark-of-google-automl-vision-using-fashion-mnist/",
    ),
)
