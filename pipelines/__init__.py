"""What runs in pipelines, as files: scenarios of the generator. The wheel carries this folder as the package `pdm._pipelines`."""
