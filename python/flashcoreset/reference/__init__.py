"""The definitions in plain torch: slow, readable, and what every other backend is tested against."""
