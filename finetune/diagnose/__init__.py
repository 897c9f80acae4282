"""Is a run healthy? Ranges, measurements while it trains, and the verdict."""
