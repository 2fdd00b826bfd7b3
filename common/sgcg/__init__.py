"""The SgCG loss in closed form and the class moments it needs, on CPU and GPU."""
