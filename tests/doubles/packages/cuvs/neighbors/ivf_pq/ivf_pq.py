import ctypes

import numpy as np
from pylibraft.common import device_ndarray
from pylibraft.common.cai_wrapper import wrap_array

from cuvs._c import handle_of
from cuvs._double import CONTROL, encode, kmeans, nearest
from cuvs.common.device_tensor_view import DeviceTensorView
from cuvs.common.exceptions import CuvsException
from cuvs.common.resources import auto_sync_resources
from cuvs.neighbors.common import _check_input_array

VECTORS = [np.dtype("float32"), np.dtype("float16"), np.dtype("byte"), np.dtype("ubyte")]


class IndexParams:
    def __init__(
        self,
        *,
        n_lists=1024,
        metric="sqeuclidean",
        metric_arg=2.0,
        kmeans_n_iters=20,
        kmeans_trainset_fraction=0.5,
        pq_bits=8,
        pq_dim=0,
        codebook_kind="subspace",
        force_random_rotation=False,
        add_data_on_build=True,
        conservative_memory_allocation=False,
        max_train_points_per_pq_code=256,
        codes_layout="interleaved",
    ):
        if metric != "sqeuclidean" or codebook_kind != "subspace" or force_random_rotation:
            raise NotImplementedError("the double is for L2, subspaces and no rotation")
        if pq_dim * pq_bits % 8:
            raise CuvsException("pq_dim * pq_bits must be a multiple of 8")
        self.n_lists, self.metric, self.metric_arg = n_lists, metric, metric_arg
        self.kmeans_n_iters, self.kmeans_trainset_fraction = kmeans_n_iters, kmeans_trainset_fraction
        self.pq_bits, self.pq_dim, self.add_data_on_build = pq_bits, pq_dim, add_data_on_build
        self.max_train_points_per_pq_code = max_train_points_per_pq_code
        self._handle = None

    def get_handle(self):
        self._handle = self._handle or handle_of(self)
        return self._handle


class Index:
    def __init__(self, params, dim, pq_centers, centers_padded, rotation_matrix):
        self._params, self._dim = params, dim
        self._pq_centers, self._padded, self._rotation = pq_centers, centers_padded, rotation_matrix
        self.trained = True

    n_lists = property(lambda self: self._params.n_lists)
    dim = property(lambda self: self._dim)
    pq_dim = property(lambda self: self._params.pq_dim)
    pq_bits = property(lambda self: self._params.pq_bits)
    pq_len = property(lambda self: self._dim // self._params.pq_dim)
    centers = property(lambda self: DeviceTensorView(self._padded()[:, : self._dim]))
    centers_padded = property(lambda self: DeviceTensorView(self._padded()))
    pq_centers = property(lambda self: DeviceTensorView(self._pq_centers()))
    centers_rot = property(lambda self: DeviceTensorView(self._padded()[:, : self._dim]))
    rotation_matrix = property(lambda self: DeviceTensorView(self._rotation()))


def _padded_width(dim):
    return (dim + 1 + 7) // 8 * 8


@auto_sync_resources
def build(index_params, dataset, resources=None):
    wrapped = wrap_array(dataset)
    _check_input_array(wrapped, VECTORS)
    CONTROL.take(*wrapped.shape)
    vectors = wrapped.view().astype(np.float32)
    p, dim = index_params, vectors.shape[1]
    if len(vectors) < p.n_lists:
        raise CuvsException("number of rows can't be less than n_lists")
    # The real one finds out where a mesocluster is left without vectors.
    if len(np.unique(vectors[: 4 * p.n_lists], axis=0)) < min(4, p.n_lists):
        raise CuvsException(
            "RAFT failure at file=double: Number of fine clusters must be zero for the empty mesocluster (got 5)"
        )
    rows = int(
        len(vectors) // max(1, len(vectors) // max(p.kmeans_trainset_fraction * len(vectors), p.n_lists))
    )
    # Of the whole, wherever they lie.
    train = vectors[np.random.default_rng(1).permutation(len(vectors))[:rows]]
    centers = kmeans(train, p.n_lists, p.kmeans_n_iters)
    train = train[: p.max_train_points_per_pq_code << p.pq_bits]
    residuals = train - centers[nearest(train, centers)]
    width = dim // p.pq_dim
    codebook = np.stack(
        [
            kmeans(residuals[:, m * width : (m + 1) * width], 1 << p.pq_bits, p.kmeans_n_iters).T
            for m in range(p.pq_dim)
        ]
    )
    padded = np.zeros((p.n_lists, _padded_width(dim)), np.float32)
    padded[:, :dim] = centers
    padded[:, dim] = (centers**2).sum(1)
    rotation = CONTROL.rotation if CONTROL.rotation is not None else np.eye(dim, dtype=np.float32)
    return Index(p, dim, lambda: codebook, lambda: padded, lambda: rotation)


@auto_sync_resources
def build_precomputed(index_params, dim, pq_centers, centers, centers_rot, rotation_matrix, resources=None):
    p, arrays = index_params, [wrap_array(a) for a in (pq_centers, centers, centers_rot, rotation_matrix)]
    shapes = [
        (p.pq_dim, dim // p.pq_dim, 1 << p.pq_bits),
        (p.n_lists, _padded_width(dim)),
        (p.n_lists, dim),
        (dim, dim),
    ]
    for array, shape in zip(arrays, shapes, strict=True):
        _check_input_array(array, [np.dtype("float32")])
        if not array.from_cai:
            raise CuvsException("should have device compatible memory")
        if tuple(array.shape) != shape:
            raise CuvsException(f"got {array.shape}, expected {shape}")
    if not np.array_equal(arrays[2].view(), arrays[1].view()[:, :dim]):
        raise CuvsException("centers_rot is not the rotated centers")
    # The index only refers to the arrays: whoever frees them meanwhile is found out, because the memory is poisoned.
    return Index(p, dim, arrays[0].view, arrays[1].view, arrays[3].view)


@auto_sync_resources
def transform(index, input_dataset, output_labels=None, output_dataset=None, resources=None):
    vectors = wrap_array(input_dataset)
    _check_input_array(vectors, VECTORS)
    rows, columns = vectors.shape[0], -(-index.pq_dim * index.pq_bits // 8)
    if output_labels is None:
        output_labels = device_ndarray.empty((rows), dtype="uint32")
    labels = wrap_array(output_labels)
    _check_input_array(labels, [np.dtype("uint32")], exp_rows=rows)
    if output_dataset is None:
        output_dataset = device_ndarray.empty((rows, columns), dtype="uint8")
    codes = wrap_array(output_dataset)
    _check_input_array(codes, [np.dtype("uint8")], exp_rows=rows, exp_cols=columns)
    for name, array in (("input_dataset", vectors), ("output_labels", labels), ("output_dataset", codes)):
        if not array.from_cai:
            raise CuvsException(f"{name} should have device compatible memory")
    CONTROL.take(*vectors.shape, resources)
    # What was put on the stream before is done before.
    resources.sync()
    values = vectors.view().astype(np.float32)
    centers = index._padded()[:, : index.dim]
    chosen = nearest(values, centers)
    found = encode(values - centers[chosen], index._pq_centers(), index.pq_bits)
    if CONTROL.put_off and resources.stream != 2:
        put_off(resources.stream, labels, chosen, vectors)
        put_off(resources.stream, codes, found, vectors)
        return output_labels, output_dataset
    labels.view()[:] = chosen
    codes.view()[:] = found
    return output_labels, output_dataset


def put_off(stream, output, result, vectors):
    """Let an output be there when the stream comes to it."""
    content, size = np.ascontiguousarray(result).tobytes(), vectors.view().nbytes
    pointers = (ctypes.c_void_p(output.ai_["data"][0]), content, ctypes.c_size_t(len(content)))
    inputs = (ctypes.c_void_p(vectors.ai_["data"][0]), ctypes.c_size_t(size))
    ctypes.CDLL("libcuda.so").fake_cuda_computed(ctypes.c_void_p(stream), *pointers, *inputs)
