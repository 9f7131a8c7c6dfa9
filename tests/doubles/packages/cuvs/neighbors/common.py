def _check_input_array(cai, exp_dt, exp_rows=None, exp_cols=None, exp_row_major=True):
    if cai.dtype not in exp_dt:
        raise TypeError(f"dtype {cai.dtype} not supported")
    if exp_row_major and not cai.c_contiguous:
        raise ValueError("Row major input is expected")
    if exp_cols is not None and cai.shape[1] != exp_cols:
        raise ValueError(f"Incorrect number of columns, expected {exp_cols} got {cai.shape[1]}")
    if exp_rows is not None and cai.shape[0] != exp_rows:
        raise ValueError(f"Incorrect number of rows, expected {exp_rows} , got {cai.shape[0]}")
