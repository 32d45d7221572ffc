package topology

// What Redoubt's virtio devices need under the native monitor, which its emulator holds against the
// devices that it makes. A device has a vector a queue and one for its configuration (virtio 1.2
// §4.1.4.3).
const (
	virtioBAR      = 0x8000
	rngVectors     = 2
	channelVectors = 5
	diskVectors    = 2
	nicVectors     = 3
)

// Guest is the request for a guest of Redoubt's with so many disks and NICs. msix is whether its
// NICs have MSI-X; where not they have INTx, which under QEMU without KVM is all that works.
func Guest(m Machine, disks, nics int, msix bool) Request {
	bar, nic := uint64(virtioBAR), nicVectors
	if m == QEMU {
		bar = 0
	}
	if !msix {
		nic = 0
	}
	return Request{Machine: m, Devices: []Devices{
		{Kind: RNG, Count: 1, BAR: bar, Vectors: rngVectors},
		{Kind: Channel, Count: 1, BAR: bar, Vectors: channelVectors},
		{Kind: Disk, Count: disks, BAR: bar, Vectors: diskVectors},
		{Kind: NIC, Count: nics, BAR: bar, Vectors: nic},
	}}
}
