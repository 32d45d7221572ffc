// Package network is what lies between guests' network devices and the outside: a network
// namespace of Redoubt's own, a tap for each NIC, bridges that keep VLANs apart, and a filter that
// lets each NIC speak only in its own name.
//
// [Plan] says what is to be there; it is pure. [Apply] makes it so; it may be called at any time
// and again, finds what is there and goes on, and changes nothing that is right already, so that a
// service that was killed is replaced without a packet's loss. Nothing outside the namespace is
// touched, and nothing survives it.
//
// A NIC that is [NIC.Quarantined] leaves its VLAN for that of the [Quarantine]: its port is isolated from those of others there
// (IFLA_BRPORT_ISOLATED), its station's entry goes with it, and it may say only what reaching the remediation addresses
// takes: ARP and neighbour solicitations for them, advertisements and IP packets to them, from its own
// addresses where they are fixed, and nothing to several stations at once besides. What comes in by the uplinks
// of that VLAN is not filtered. A port that moves, there or back, is cut off in both directions while it does: no frame
// passes with the old filter in the new VLAN, or with the new one in the old, and if the mover dies it stays cut off until the next
// [Apply]. The tap, its queue and the guest's driver notice nothing. Without a VLAN for it, or where a NIC with the same MAC has
// come first, a quarantined NIC is in no VLAN at all: its port is up, in a bridge without a way out of it, and mute.
//
// All names of interfaces, chains and sets are made here from numbers.
package network
