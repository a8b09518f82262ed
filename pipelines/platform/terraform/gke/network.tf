locals {
  nodes_cidr    = cidrsubnet(var.network_cidr, 4, 0)
  services_cidr = cidrsubnet(var.network_cidr, 4, 1)
  database_cidr = cidrsubnet(var.network_cidr, 4, 2)
  pods_cidr     = cidrsubnet(var.network_cidr, 1, 1)
}

resource "google_project_service" "needed" {
  for_each = toset([
    "artifactregistry.googleapis.com", "bigquery.googleapis.com", "compute.googleapis.com", "container.googleapis.com",
    "iam.googleapis.com", "secretmanager.googleapis.com", "servicenetworking.googleapis.com", "sqladmin.googleapis.com",
  ])
  service            = each.value
  disable_on_destroy = false
}

resource "google_compute_network" "main" {
  #checkov:skip=CKV2_GCP_18:A network without rules lets nothing in; GKE adds those that its nodes need
  name                    = var.name
  auto_create_subnetworks = false
  depends_on              = [google_project_service.needed]
}

resource "google_compute_subnetwork" "nodes" {
  #checkov:skip=CKV_GCP_76:No IPv6 address is given out here, so there is no private access over IPv6 to switch on
  name                     = "${var.name}-nodes"
  network                  = google_compute_network.main.id
  ip_cidr_range            = local.nodes_cidr
  private_ip_google_access = true

  secondary_ip_range {
    range_name    = "pods"
    ip_cidr_range = local.pods_cidr
  }
  secondary_ip_range {
    range_name    = "services"
    ip_cidr_range = local.services_cidr
  }
  log_config {
    aggregation_interval = "INTERVAL_10_MIN"
    flow_sampling        = 0.1
  }
}

# Nodes have no public address; images that are not in our registry come through here.
resource "google_compute_router" "main" {
  name    = var.name
  network = google_compute_network.main.id
}

resource "google_compute_router_nat" "main" {
  name                               = var.name
  router                             = google_compute_router.main.name
  nat_ip_allocate_option             = "AUTO_ONLY"
  source_subnetwork_ip_ranges_to_nat = "ALL_SUBNETWORKS_ALL_IP_RANGES"
  log_config {
    enable = true
    filter = "ERRORS_ONLY"
  }
}

# Where Google keeps the address of Cloud SQL.
resource "google_compute_global_address" "database" {
  name          = "${var.name}-database"
  network       = google_compute_network.main.id
  purpose       = "VPC_PEERING"
  address_type  = "INTERNAL"
  address       = cidrhost(local.database_cidr, 0)
  prefix_length = 20
}

resource "google_service_networking_connection" "database" {
  network                 = google_compute_network.main.id
  service                 = "servicenetworking.googleapis.com"
  reserved_peering_ranges = [google_compute_global_address.database.name]
}
