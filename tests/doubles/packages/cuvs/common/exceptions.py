class CuvsException(Exception):
    pass
