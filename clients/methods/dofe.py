"""DoFE: feature embedding with a pool of domain knowledge (`common.domain_pool`)."""

from __future__ import annotations

from fedsgcg.clients.methods.base import Source


class Dofe(Source):
    """DoFE: adds to the feature map what is known of the training domains that an image is like.

    Formula: L = L_supervised of the logits of h + (s @ mu) * tanh(conv(h)), with the feature map h,
        the hospitals' mean features mu and the similarities s = softmax_d log N(m; mu_d, Sigma_d)
        of the image's mean feature m.
    Leaves: weights; count, mean and covariance of every class, of which the sum over the classes is
        used. The saved model holds mean and covariance of each training hospital.
    Defaults: the pool is measured in every round instead of moved by 0.1; the published code leaves
        it at its first values. The published similarities come from a classifier of the domains,
        which a client with one domain cannot train; the network is this project's U-Net.
    Source: Wang et al., DoFE: Domain-oriented Feature Embedding for Generalizable Fundus Image
        Segmentation on Unseen Datasets, IEEE TMI 2020.
    """

    raw = True
