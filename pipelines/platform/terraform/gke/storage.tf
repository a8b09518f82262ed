locals {
  # after how many days an object goes: 0 never. Versions that were replaced or deleted go after 30.
  buckets = { archive = var.archive_days, backups = var.backup_days, mlflow = 0, pipelines = 180 }
}

resource "google_storage_bucket" "main" {
  #checkov:skip=CKV_GCP_62:Who read what is in Cloud Audit Logs, which access logs of a bucket would double
  for_each                    = local.buckets
  name                        = "${var.project}-${var.name}-${each.key}"
  location                    = var.region
  uniform_bucket_level_access = true
  public_access_prevention    = "enforced"
  force_destroy               = false

  versioning {
    enabled = true
  }
  lifecycle_rule {
    action {
      type = "Delete"
    }
    condition {
      days_since_noncurrent_time = 30
    }
  }
  dynamic "lifecycle_rule" {
    for_each = each.value > 0 ? [each.value] : []
    content {
      action {
        type = "Delete"
      }
      condition {
        age = lifecycle_rule.value
      }
    }
  }
}

resource "google_artifact_registry_repository" "images" {
  #checkov:skip=CKV_GCP_84:Google encrypts at rest; a key of one's own is a decision for whoever must keep one
  repository_id = var.name
  location      = var.region
  format        = "DOCKER"
  description   = "Images that run in the cluster ${var.name}"
  docker_config {
    immutable_tags = true
  }
  depends_on = [google_project_service.needed]
}

resource "google_bigquery_dataset" "warehouse" {
  #checkov:skip=CKV_GCP_81:Google encrypts at rest; a key of one's own is a decision for whoever must keep one
  dataset_id                 = replace(var.name, "-", "_")
  location                   = var.region
  description                = "Verdicts and events of all sites (warehouse_url)"
  delete_contents_on_destroy = false
  depends_on                 = [google_project_service.needed]
}
