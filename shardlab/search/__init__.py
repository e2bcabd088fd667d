"""The best plan: candidates, ranked by an analytic cost model, confirmed by compiling."""
