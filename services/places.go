package services

import "path/filepath"

// Names in the run directory.
const (
	APISocket   = "api.sock"     // of the default tenant's toolstack
	AdminSocket = "builder.sock" // on which the Builder itself answers root, and nobody else
	LockFile    = "lock"         // held while Redoubt runs; holds its first process's id
	LogDir      = "log"
	StoreDir    = "store"     // the store's contents
	StoreSocket = "xenstored" // where XenStore's own clients, if root's, are served
)

// TenantsDir holds, in the state directory, toolstacks' records, and in the run directory their
// sockets; the default tenant's are elsewhere.
const TenantsDir = "tenants"

// DefaultTenant is there without being made.
const DefaultTenant = "default"

// DefaultUsers is the first of the user ids of services where the operator names none. It is
// beyond those that distributions give to people, services and containers.
const DefaultUsers = 0x52440000

// APIPath is the socket of a tenant's API.
func APIPath(runDir, tenant string) string {
	if tenant == DefaultTenant {
		return filepath.Join(runDir, APISocket)
	}
	return filepath.Join(runDir, TenantsDir, tenant+".sock")
}

// GuestName is what a tenant's guest is called on this host.
func GuestName(tenant, guest string) string {
	if tenant == DefaultTenant {
		return guest
	}
	return tenant + "." + guest // no name has a dot
}
