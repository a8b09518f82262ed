# MLflow's database: no public address, TLS only, backed up every night with the log kept for a week in between.
resource "google_sql_database_instance" "main" {
  #checkov:skip=CKV_GCP_6:ssl_mode says ENCRYPTED_ONLY, in the place of the argument require_ssl that this looks for, which is gone
  #checkov:skip=CKV_GCP_55:Logging at the level of errors is PostgreSQL's default
  #checkov:skip=CKV_GCP_108:Who connects is a pod, whose name no DNS server can tell from its address
  #checkov:skip=CKV_GCP_109:Statements that fail are logged from errors on, which is PostgreSQL's default
  #checkov:skip=CKV_GCP_110:pgAudit would log every metric that a training writes
  #checkov:skip=CKV_GCP_111:Logging statements would log every metric that a training writes, and the data in them
  #checkov:skip=CKV2_GCP_13:The duration of every statement is in Query Insights, without a log of them
  name                = var.name
  database_version    = "POSTGRES_18"
  region              = var.region
  deletion_protection = true

  settings {
    edition                     = "ENTERPRISE"
    tier                        = var.database_tier
    availability_type           = var.database_highly_available ? "REGIONAL" : "ZONAL"
    disk_type                   = "PD_SSD"
    disk_size                   = 20
    disk_autoresize             = true
    disk_autoresize_limit       = 200
    deletion_protection_enabled = true

    backup_configuration {
      enabled                        = true
      start_time                     = "00:00"
      point_in_time_recovery_enabled = true
      transaction_log_retention_days = 7
      backup_retention_settings {
        retained_backups = 14
      }
    }
    ip_configuration {
      ipv4_enabled    = false
      private_network = google_compute_network.main.id
      ssl_mode        = "ENCRYPTED_ONLY"
    }
    maintenance_window {
      day          = 6
      hour         = 3
      update_track = "stable"
    }
    insights_config {
      query_insights_enabled = true
    }
    database_flags {
      name  = "log_checkpoints"
      value = "on"
    }
    database_flags {
      name  = "log_connections"
      value = "on"
    }
    database_flags {
      name  = "log_disconnections"
      value = "on"
    }
    database_flags {
      name  = "log_lock_waits"
      value = "on"
    }
    database_flags {
      name  = "log_min_duration_statement"
      value = "-1"
    }
  }
  depends_on = [google_service_networking_connection.database]
}

resource "google_sql_database" "mlflow" {
  name     = "mlflow"
  instance = google_sql_database_instance.main.name
}

resource "google_sql_user" "mlflow" {
  name                = "mlflow"
  instance            = google_sql_database_instance.main.name
  password_wo         = var.database_password
  password_wo_version = var.database_password_version
}
