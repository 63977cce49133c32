"""How good a package's own frames are, in numbers: no reference to other people or other packages is needed."""
