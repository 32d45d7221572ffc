package server

import (
	"strconv"
	"strings"

	"redoubt.dev/redoubt/store/tree"
)

// Who connects. Services have fixed numbers below FirstGuest.
const (
	Builder    = tree.Privileged
	VTPM       = tree.Domain(1)
	Toolstack  = tree.Domain(2)
	FirstGuest = tree.FirstGuest
)

// ReadyPrefix begins the name of the node that says that a vTPM works, followed by its
// instance number in decimal.
const ReadyPrefix = "/vTPMready"

// ReadyNode is the node of one vTPM instance.
func ReadyNode(number int) string { return ReadyPrefix + strconv.Itoa(number) }

// ReservedNames are the forgery rules: a name that begins as a ready node's is the vTPM
// manager's.
func ReservedNames() []tree.Reserved {
	return []tree.Reserved{{
		Match: func(path string) bool { return strings.HasPrefix(path, ReadyPrefix) },
		Only:  VTPM,
	}}
}

// DomainPath is the home of a domain.
func DomainPath(d tree.Domain) string { return tree.Home(d) }

// FrontPath is the vTPM front end's directory, which the guest's emulator owns.
func FrontPath(d tree.Domain) string { return DomainPath(d) + "/device/vtpm/0" }

// BackPath is the vTPM back end's directory of the guest d, which the vTPM manager owns.
func BackPath(d tree.Domain) string {
	return DomainPath(Builder) + "/backend/vtpm/" + strconv.Itoa(int(d)) + "/0"
}
