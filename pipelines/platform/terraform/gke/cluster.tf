locals {
  gpu_pool = { key = "predmaint-pool", value = "gpu" } # what PREDMAINT_PIPELINE_NODE_POOL selects and tolerates
}

# What nodes may do: pull images, write logs and metrics. Pods have identities of their own.
resource "google_service_account" "nodes" {
  account_id   = "${var.name}-nodes"
  display_name = "Nodes of ${var.name}"
  depends_on   = [google_project_service.needed]
}

resource "google_project_iam_member" "nodes" {
  project = var.project
  role    = "roles/container.defaultNodeServiceAccount"
  member  = google_service_account.nodes.member
}

resource "google_artifact_registry_repository_iam_member" "nodes" {
  location   = google_artifact_registry_repository.images.location
  repository = google_artifact_registry_repository.images.name
  role       = "roles/artifactregistry.reader"
  member     = google_service_account.nodes.member
}

resource "google_container_cluster" "main" {
  #checkov:skip=CKV_GCP_20:The control plane has no IP endpoint that networks could be authorised for: it is reached by its DNS name, which asks IAM
  #checkov:skip=CKV_GCP_65:Groups for RBAC need a Google Workspace, which not every user of this module has; access is by IAM
  #checkov:skip=CKV_GCP_66:Binary Authorization would have to let Kubeflow's images in by name; ours are pinned by digest, and bundles are signed
  #checkov:skip=CKV_GCP_69:The metadata server is set on both node pools; the default pool, which this looks at, is removed
  #checkov:skip=CKV_GCP_12:Dataplane V2 enforces NetworkPolicies, and excludes the older add-on that this looks for
  #checkov:skip=CKV_GCP_61:Flow logs of the subnetwork are on; visibility inside a node would log each step's talk with Kubeflow
  name                     = var.name
  location                 = var.region
  network                  = google_compute_network.main.id
  subnetwork               = google_compute_subnetwork.nodes.id
  networking_mode          = "VPC_NATIVE"
  datapath_provider        = "ADVANCED_DATAPATH"
  enable_shielded_nodes    = true
  remove_default_node_pool = true
  initial_node_count       = 1
  deletion_protection      = true
  resource_labels          = { app = "predmaint" }

  ip_allocation_policy {
    cluster_secondary_range_name  = "pods"
    services_secondary_range_name = "services"
  }
  private_cluster_config {
    enable_private_nodes = true
  }
  control_plane_endpoints_config {
    dns_endpoint_config {
      allow_external_traffic = true
    }
    ip_endpoints_config {
      enabled = false
    }
  }
  master_auth {
    client_certificate_config {
      issue_client_certificate = false
    }
  }
  workload_identity_config {
    workload_pool = "${var.project}.svc.id.goog"
  }
  release_channel {
    channel = "REGULAR"
  }
  maintenance_policy {
    recurring_window { # GKE wants 48 hours of it in 32 days; the retraining is on Sundays
      start_time = "2026-01-02T03:00:00Z"
      end_time   = "2026-01-02T09:00:00Z"
      recurrence = "FREQ=WEEKLY;BYDAY=FR,SA"
    }
  }
  security_posture_config {
    mode = "BASIC"
  }
  # Only while the cluster is made: the default pool, which goes at once.
  node_config {
    service_account = google_service_account.nodes.email
    shielded_instance_config {
      enable_secure_boot          = true
      enable_integrity_monitoring = true
    }
  }
  lifecycle {
    ignore_changes = [node_config]
  }
}

resource "google_container_node_pool" "cpu" {
  name     = "cpu"
  cluster  = google_container_cluster.main.id
  location = var.region

  autoscaling {
    total_min_node_count = var.cpu_nodes.min
    total_max_node_count = var.cpu_nodes.max
    location_policy      = "BALANCED"
  }
  management {
    auto_repair  = true
    auto_upgrade = true
  }
  node_config {
    machine_type    = var.cpu_machine_type
    image_type      = "COS_CONTAINERD"
    disk_size_gb    = 100
    disk_type       = "pd-balanced"
    service_account = google_service_account.nodes.email
    oauth_scopes    = ["https://www.googleapis.com/auth/cloud-platform"]
    labels          = { "predmaint-pool" = "cpu" }
    metadata        = { disable-legacy-endpoints = "true" }
    shielded_instance_config {
      enable_secure_boot          = true
      enable_integrity_monitoring = true
    }
    workload_metadata_config {
      mode = "GKE_METADATA"
    }
  }
}

resource "google_container_node_pool" "gpu" {
  name     = "gpu"
  cluster  = google_container_cluster.main.id
  location = var.region

  autoscaling {
    total_min_node_count = 0
    total_max_node_count = var.gpu_nodes_max
    location_policy      = "ANY"
  }
  management {
    auto_repair  = true
    auto_upgrade = true
  }
  node_config {
    spot            = true
    machine_type    = var.gpu_machine_type
    image_type      = "COS_CONTAINERD"
    disk_size_gb    = 100
    disk_type       = "pd-balanced"
    service_account = google_service_account.nodes.email
    oauth_scopes    = ["https://www.googleapis.com/auth/cloud-platform"]
    labels          = { (local.gpu_pool.key) = local.gpu_pool.value }
    metadata        = { disable-legacy-endpoints = "true" }
    guest_accelerator {
      type  = "nvidia-l4"
      count = 1
      gpu_driver_installation_config {
        gpu_driver_version = "DEFAULT"
      }
    }
    taint {
      key    = local.gpu_pool.key
      value  = local.gpu_pool.value
      effect = "NO_SCHEDULE"
    }
    shielded_instance_config {
      enable_secure_boot          = true
      enable_integrity_monitoring = true
    }
    workload_metadata_config {
      mode = "GKE_METADATA"
    }
  }
}
