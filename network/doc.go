// Package network is what lies between guests' network devices and the outside: a network
// namespace of Redoubt's own, a tap for each NIC, bridges that keep VLANs apart, and a filter that
// lets each NIC speak only in its own name.
//
// [Plan] says what is to be there; it is pure. [Apply] makes it so; it may be called at any time
// and again, finds what is there and goes on, and changes nothing that is right already, so that a
// service that was killed is replaced without a packet's loss. Nothing outside the namespace is
// touched, and nothing survives it.
//
// All names of interfaces, chains and sets are made here from numbers.
package network
