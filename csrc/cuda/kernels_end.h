// Forgets the macros under which kernels.def was read; no guard: it is read as often as that is.
#undef FL_OUT
#undef FL_IN
#undef FL_WEIGHT
#undef FL_INT
#undef FL_FLOAT
#undef FL_KERNEL
