"""The operator with the key scan in two Triton kernels: one launch each for a sequence of any length.

What queries read is that of `moshi_ttt.manual`, for all groups at once. `support` says where this runs.
Nothing here but `kernels` imports Triton, and that only when the operator runs.
"""
