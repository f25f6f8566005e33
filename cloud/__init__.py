"""The project on Databricks: bundle, environment of the cluster, and what keeps a run on a volume."""
