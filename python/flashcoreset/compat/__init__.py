"""Import swaps for programs written against other libraries: `flashcoreset.compat.ot` for POT, `flashcoreset.compat.geomloss` for
geomloss, and so on. Each module has the peer's names, arguments and results, and needs nothing of the peer."""
