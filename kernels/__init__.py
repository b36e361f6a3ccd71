"""The masked NTK products: one folder an operation, one file an implementation."""
