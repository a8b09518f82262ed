"""What runs on the edge, as files. The wheel carries this folder as the package `pdm._edge`, read through importlib.resources."""
