"""Faces for voice agents: adapters for LiveKit Agents and Pipecat, over the client, each imported by its own name."""
