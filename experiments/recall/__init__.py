"""Does the memory carry what lies beyond the attention window? Five arms of a tiny Moshi on two tasks."""
