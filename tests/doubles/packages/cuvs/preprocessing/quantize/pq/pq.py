import numpy as np
from pylibraft.common.cai_wrapper import wrap_array

from cuvs._double import CONTROL, kmeans
from cuvs.common.device_tensor_view import DeviceTensorView
from cuvs.common.exceptions import CuvsException
from cuvs.common.resources import auto_sync_resources
from cuvs.neighbors.common import _check_input_array


class QuantizerParams:
    def __init__(
        self,
        *,
        pq_bits=8,
        pq_dim=0,
        use_subspaces=True,
        use_vq=False,
        vq_n_centers=0,
        kmeans_n_iters=25,
        pq_kmeans_type="kmeans_balanced",
        max_train_points_per_pq_code=256,
        max_train_points_per_vq_cluster=1024,
    ):
        if pq_bits < 4 or pq_bits > 16:
            raise ValueError("pq_bits must be within [4, 16]")
        if use_vq or not use_subspaces or pq_kmeans_type not in ("kmeans", "kmeans_balanced"):
            raise NotImplementedError("the double is for subspaces without a vector quantizer")
        self.pq_bits, self.pq_dim, self.kmeans_n_iters = pq_bits, pq_dim, kmeans_n_iters
        self.max_train_points_per_pq_code = max_train_points_per_pq_code


class Quantizer:
    def __init__(self, params, codebook):
        self._params, self._codebook = params, codebook

    pq_bits = property(lambda self: self._params.pq_bits)
    pq_dim = property(lambda self: self._params.pq_dim)
    pq_codebook = property(lambda self: DeviceTensorView(self._codebook))


@auto_sync_resources
def build(params, dataset, resources=None):
    wrapped = wrap_array(dataset)
    _check_input_array(wrapped, [np.dtype("float32")])
    CONTROL.take(*wrapped.shape)
    CONTROL.pageable += not wrapped.from_cai
    vectors = wrapped.view()[: params.max_train_points_per_pq_code << params.pq_bits]
    if vectors.shape[1] % params.pq_dim:
        raise CuvsException("RAFT failure at file=double: Dimension must be divisible by pq_dim")
    if len(vectors) < 1 << params.pq_bits:
        raise CuvsException(
            "RAFT failure at file=double: The number of training samples must be equal to or greater than the number of PQ centers"
        )
    width = vectors.shape[1] // params.pq_dim
    books = [
        kmeans(vectors[:, m * width : (m + 1) * width], 1 << params.pq_bits, params.kmeans_n_iters)
        for m in range(params.pq_dim)
    ]
    return Quantizer(params, np.concatenate(books))
