"""Moshi's web protocol for a trained model: the websocket, who may use it, and a page of our own."""
