"""The reference design: what this service looked like before, written afresh from its description.

grpcio's asyncio server; OpenCV decodes all four videos of a package into memory; a plain float32 PyTorch network takes
frames one after another; OpenCV composites and encodes the whole frame at quality 95. It shares the contract, the
network's definition and the feature windows with lipsync, and nothing else.
"""
