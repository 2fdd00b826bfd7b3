"""The SgCG loss in closed form and the class moments that it needs, on CPU and GPU."""
