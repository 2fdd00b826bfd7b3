"""BigAug: supervised training on strongly transformed slices (`clients.data.bigaug`)."""

from __future__ import annotations

from fedsgcg.clients.methods.base import Source


class BigAug(Source):
    """BigAug: the supervised baseline on slices with nine stacked transforms.

    Formula: L = L_supervised(T(x), T(y)), T = sharpness, blur, noise, brightness, contrast,
        perturbation, rotation, scale and elastic deformation, each with probability 1/2; the last
        three move the mask too.
    Leaves: weights.
    Defaults: probability and ranges as published, in deviations of the slice. The size of the
        elastic deformation and the order of the transforms are our choice. They follow the changes
        of `data.augmentation`; set `augmentation=none` for BigAug's alone.
    Source: Zhang et al., Generalizing Deep Learning for Medical Image Segmentation to Unseen
        Domains via Deep Stacked Transformation, IEEE TMI 2020.
    """
