output "site" {
  description = "kustomize/overlays/gke/site.yaml, to be committed there."
  value = templatefile("${path.module}/site.yaml.tftpl", {
    prefix   = "${var.project}-${var.name}"
    database = local.database_cidr
  })
}

output "registry" {
  description = "Where images are pushed to, and the beginning of newName in kustomize/overlays/gke/images."
  value       = "${var.region}-docker.pkg.dev/${var.project}/${google_artifact_registry_repository.images.name}"
}

output "database" {
  description = "What the secret mlflow-database holds, but for PGPASSWORD."
  value = {
    PGHOST     = google_sql_database_instance.main.private_ip_address
    PGPORT     = "5432"
    PGDATABASE = google_sql_database.mlflow.name
    PGUSER     = google_sql_user.mlflow.name
    PGSSLMODE  = "require"
  }
}

output "warehouse_url" {
  description = "What the sinks of the sites are told (PREDMAINT_WAREHOUSE_URL). Steps don't read it."
  value       = "bigquery://${var.project}/${google_bigquery_dataset.warehouse.dataset_id}"
}

output "gpu_settings" {
  description = "Settings (kustomize/overlays/gke/site.yaml) that send training to the GPU nodes."
  value = {
    PREDMAINT_PIPELINE_GPU       = "nvidia.com/gpu=1"
    PREDMAINT_PIPELINE_NODE_POOL = "${local.gpu_pool.key}=${local.gpu_pool.value}"
  }
}

output "credentials" {
  description = "The command that lets kubectl in."
  value       = "gcloud container clusters get-credentials ${google_container_cluster.main.name} --region ${var.region} --project ${var.project} --dns-endpoint"
}
