"""Optional adapters onto other libraries' names. There is none yet."""
