class DeviceMemoryResource:
    pass


class CudaMemoryResource(DeviceMemoryResource):
    pass


class CudaAsyncMemoryResource(DeviceMemoryResource):
    def __init__(self, initial_pool_size=None, release_threshold=None, enable_ipc=False):
        pass


_current = CudaMemoryResource()


def get_current_device_resource():
    return _current


def set_current_device_resource(mr):
    global _current
    _current = mr
