package protocol

import "redoubt.dev/redoubt/sandbox"

// Root → Builder, over services.AdminSocket.
const (
	MethodServices = "services" // nothing → Answered: JSON of []RunningService, the processes that run
	MethodReset    = "reset"    // Reset → ResetDone: a service's processes are replaced now, as by its timer
	MethodTenants  = "tenants"  // nothing → []trust.Tenant
	// MethodSetTenant makes a tenant or changes it, and its toolstack runs.
	MethodSetTenant    = "set-tenant"    // trust.Tenant → nothing
	MethodRemoveTenant = "remove-tenant" // trust.Tenant, of which the name counts → nothing
)

// Reset names the service and, where it is not to be all, the guest.
type Reset struct {
	Service string `json:"service"`
	Guest   string `json:"guest,omitempty"`
}

// ResetDone says how many were replaced.
type ResetDone struct {
	Replaced int `json:"replaced"`
}

// RunningService is a process that the Builder started and what is declared for it.
type RunningService struct {
	Service  string        `json:"service"`
	Label    string        `json:"label"`
	PID      int           `json:"pid"`
	Declared sandbox.State `json:"declared"`
}
