package manager

import (
	"bytes"
	"context"
	"crypto/ecdsa"
	"errors"
	"fmt"

	"github.com/google/go-tpm/tpm2"
	"github.com/google/go-tpm/tpm2/transport"

	"redoubt.dev/redoubt/vtpm/journal"
)

// Handles of what manufacture leaves in the TPM.
const (
	// The EK lies where TCG's Registry of Reserved TPM 2.0 Handles §2.3 puts endorsement keys, next to
	// the RSA one that swtpm_setup would make. The guest's owner may evict it; it comes back.
	handleEK tpm2.TPMHandle = 0x81010002
	// The AK lies in the platform's range (Part 2 §7.5): only platform authorisation evicts it.
	handleAK tpm2.TPMHandle = 0x81800000
	// Certificate of the P-256 EK of template L-2 (EK Credential Profile §2.2.1.4).
	indexEKCertificate tpm2.TPMHandle = 0x01c0000a
)

// akTemplate is a restricted signing key of P-256. It has no authorisation: whoever may send
// commands may have a quote, which says nothing but the truth.
var akTemplate = tpm2.TPMTPublic{
	Type: tpm2.TPMAlgECC, NameAlg: tpm2.TPMAlgSHA256,
	ObjectAttributes: tpm2.TPMAObject{
		FixedTPM: true, FixedParent: true, SensitiveDataOrigin: true, UserWithAuth: true, NoDA: true,
		Restricted: true, SignEncrypt: true,
	},
	Parameters: tpm2.NewTPMUPublicParms(tpm2.TPMAlgECC, &tpm2.TPMSECCParms{
		CurveID: tpm2.TPMECCNistP256,
		Scheme: tpm2.TPMTECCScheme{
			Scheme:  tpm2.TPMAlgECDSA,
			Details: tpm2.NewTPMUAsymScheme(tpm2.TPMAlgECDSA, &tpm2.TPMSSigSchemeECDSA{HashAlg: tpm2.TPMAlgSHA256}),
		},
	}),
}

// background makes what a new vTPM lacks and repairs what the guest's owner threw away.
func (d *Device) background(ctx context.Context, fresh bool) {
	defer close(d.manufactured)
	if fresh {
		if d.mErr = d.saveNew(); d.mErr != nil {
			return
		}
		d.note.Now(journal.Durable)
	}
	d.give() // the first turn
	if !d.rec.manufactured() {
		if err := d.manufacture(ctx); err != nil {
			d.mErr = fmt.Errorf("manufacture the vTPM of guest %s: %w", d.rec.Guest, err)
			return
		}
	}
	// Neither is needed for attestation: a guest that has taken the owner hierarchy or the
	// room keeps it.
	_ = d.Host(ctx, d.storeCertificate)
	_ = d.Host(ctx, d.persistEK)
}

// manufacture makes the identity in short steps, between which the guest's commands run, and records
// it. An interrupted one is begun again at the next start: the keys come from the TPM's
// seeds and are the same again.
func (d *Device) manufacture(ctx context.Context) error {
	var ak, ek *tpm2.TPMTPublic
	var facts tpmFacts
	if err := d.Host(ctx, func(tpm transport.TPM) (err error) {
		ak, err = d.persistAK(tpm)
		return err
	}); err != nil {
		return fmt.Errorf("AK: %w", err)
	}
	if err := d.Host(ctx, func(tpm transport.TPM) (err error) {
		if facts, err = readFacts(tpm); err != nil {
			return err
		}
		return withEK(tpm, func(_ tpm2.NamedHandle, pub *tpm2.TPMTPublic) error {
			ek = pub
			return nil
		})
	}); err != nil {
		return fmt.Errorf("EK: %w", err)
	}
	key, err := publicKey(ek)
	if err != nil {
		return fmt.Errorf("EK: %w", err)
	}
	cert, err := d.m.ca.issueEK(d.rec.Guest, key, facts)
	if err != nil {
		return fmt.Errorf("EK certificate: %w", err)
	}
	ekName, err := tpm2.ObjectName(ek)
	if err != nil {
		return fmt.Errorf("EK: %w", err)
	}
	akName, err := tpm2.ObjectName(ak)
	if err != nil {
		return fmt.Errorf("AK: %w", err)
	}
	d.rec.setIdentity(cert, ekName.Buffer, tpm2.Marshal(ak), akName.Buffer)
	if err := d.m.save(d.rec); err != nil {
		d.rec.setIdentity(nil, nil, nil, nil)
		return err
	}
	return nil
}

func publicKey(p *tpm2.TPMTPublic) (*ecdsa.PublicKey, error) {
	k, err := tpm2.Pub(*p)
	if err != nil {
		return nil, err
	}
	e, ok := k.(*ecdsa.PublicKey)
	if !ok {
		return nil, errors.New("not an ECC key")
	}
	return e, nil
}

// platform authorises a command with the platform hierarchy.
func (d *Device) platform() tpm2.AuthHandle {
	return tpm2.AuthHandle{Handle: tpm2.TPMRHPlatform, Auth: tpm2.PasswordAuth(d.platformAuth)}
}

// readPublic is the public area and name at a handle, nil if there is nothing.
func readPublic(tpm transport.TPM, h tpm2.TPMHandle) (*tpm2.TPMTPublic, []byte, error) {
	rsp, err := tpm2.ReadPublic{ObjectHandle: h}.Execute(tpm)
	if errors.Is(err, tpm2.TPMRCHandle) {
		return nil, nil, nil
	}
	if err != nil {
		return nil, nil, err
	}
	pub, err := rsp.OutPublic.Contents()
	return pub, rsp.Name.Buffer, err
}

// LeavePlatform gives the platform hierarchy to the guest's firmware, whose it is on a machine
// that has firmware: it sets a random authorisation of its own before it boots anything, and
// takes a TPM that refuses that for broken. It waits for manufacture, which needs the
// hierarchy. To be called after each start and reset, before the guest's first command.
func (d *Device) LeavePlatform(ctx context.Context) error {
	if err := d.Manufactured(ctx); err != nil {
		return err
	}
	err := d.Host(ctx, func(tpm transport.TPM) error {
		_, err := tpm2.HierarchyChangeAuth{AuthHandle: d.platform()}.Execute(tpm)
		return err
	})
	if err != nil {
		return fmt.Errorf("leave the platform hierarchy of guest %s: %w", d.rec.Guest, err)
	}
	return nil
}

// persistAK makes the AK, unless it is there.
func (d *Device) persistAK(tpm transport.TPM) (_ *tpm2.TPMTPublic, err error) {
	// Nobody but us can have put it there: it takes platform authorisation.
	if pub, _, err := readPublic(tpm, handleAK); err != nil || pub != nil {
		return pub, err
	}
	rsp, err := tpm2.CreatePrimary{PrimaryHandle: d.platform(), InPublic: tpm2.New2B(akTemplate)}.Execute(tpm)
	if err != nil {
		return nil, err
	}
	defer flush(tpm, rsp.ObjectHandle, &err)
	if _, err := (tpm2.EvictControl{
		Auth:             d.platform(),
		ObjectHandle:     tpm2.NamedHandle{Handle: rsp.ObjectHandle, Name: rsp.Name},
		PersistentHandle: handleAK,
	}).Execute(tpm); err != nil {
		return nil, err
	}
	return rsp.OutPublic.Contents()
}

// flush gives a slot free; its error counts if there is no other.
func flush(tpm transport.TPM, h tpm2.TPMHandle, err *error) {
	if _, ferr := (tpm2.FlushContext{FlushHandle: h}).Execute(tpm); *err == nil {
		*err = ferr
	}
}

// withEK makes the EK from its seed (template L-2, EK Credential Profile §B.3.4) and runs f with it.
func withEK(tpm transport.TPM, f func(tpm2.NamedHandle, *tpm2.TPMTPublic) error) (err error) {
	rsp, err := tpm2.CreatePrimary{
		PrimaryHandle: tpm2.AuthHandle{Handle: tpm2.TPMRHEndorsement, Auth: tpm2.PasswordAuth(nil)},
		InPublic:      tpm2.New2B(tpm2.ECCEKTemplate),
	}.Execute(tpm)
	if err != nil {
		return fmt.Errorf("make the EK (has the guest set an endorsement password?): %w", err)
	}
	defer flush(tpm, rsp.ObjectHandle, &err)
	pub, err := rsp.OutPublic.Contents()
	if err != nil {
		return err
	}
	return f(tpm2.NamedHandle{Handle: rsp.ObjectHandle, Name: rsp.Name}, pub)
}

// persistEK puts the EK under its usual handle for the guest's software, where that is free.
func (d *Device) persistEK(tpm transport.TPM) error {
	if pub, _, err := readPublic(tpm, handleEK); err != nil || pub != nil {
		return err
	}
	return withEK(tpm, func(ek tpm2.NamedHandle, _ *tpm2.TPMTPublic) error {
		_, err := tpm2.EvictControl{
			Auth:             tpm2.AuthHandle{Handle: tpm2.TPMRHOwner, Auth: tpm2.PasswordAuth(nil)},
			ObjectHandle:     ek,
			PersistentHandle: handleEK,
		}.Execute(tpm)
		return err
	})
}

// nvChunk is what is written to or read from NV at a time in bytes, less than any TPM's
// TPM_PT_NV_BUFFER_MAX (512 or more).
const nvChunk = 512

// storeCertificate writes the EK certificate into NV, unless it is there: readable by all, writable
// by the platform only, and kept over TPM2_Clear.
func (d *Device) storeCertificate(tpm transport.TPM) error {
	cert, _ := d.rec.identity()
	old, err := readNV(tpm, indexEKCertificate)
	if err == nil && bytes.Equal(old, cert) {
		return nil
	}
	if pub, err := (tpm2.NVReadPublic{NVIndex: indexEKCertificate}).Execute(tpm); err == nil {
		if _, err := (tpm2.NVUndefineSpace{
			AuthHandle: d.platform(),
			NVIndex:    tpm2.NamedHandle{Handle: indexEKCertificate, Name: pub.NVName},
		}).Execute(tpm); err != nil {
			return fmt.Errorf("EK certificate: %w", err)
		}
	}
	if _, err := (tpm2.NVDefineSpace{
		AuthHandle: d.platform(),
		PublicInfo: tpm2.New2B(tpm2.TPMSNVPublic{
			NVIndex: indexEKCertificate, NameAlg: tpm2.TPMAlgSHA256, DataSize: uint16(len(cert)),
			Attributes: tpm2.TPMANV{
				PlatformCreate: true, PPWrite: true, PPRead: true, OwnerRead: true, AuthRead: true, NoDA: true,
			},
		}),
	}).Execute(tpm); err != nil {
		return fmt.Errorf("EK certificate: %w", err)
	}
	for off := 0; off < len(cert); off += nvChunk {
		pub, err := tpm2.NVReadPublic{NVIndex: indexEKCertificate}.Execute(tpm) // the first write changes the name
		if err != nil {
			return fmt.Errorf("EK certificate: %w", err)
		}
		if _, err := (tpm2.NVWrite{
			AuthHandle: d.platform(),
			NVIndex:    tpm2.NamedHandle{Handle: indexEKCertificate, Name: pub.NVName},
			Data:       tpm2.TPM2BMaxNVBuffer{Buffer: cert[off:min(off+nvChunk, len(cert))]},
			Offset:     uint16(off),
		}).Execute(tpm); err != nil {
			return fmt.Errorf("EK certificate: %w", err)
		}
	}
	return nil
}

// readNV reads an index that needs no authorisation.
func readNV(tpm transport.TPM, index tpm2.TPMHandle) ([]byte, error) {
	rsp, err := tpm2.NVReadPublic{NVIndex: index}.Execute(tpm)
	if err != nil {
		return nil, err
	}
	pub, err := rsp.NVPublic.Contents()
	if err != nil {
		return nil, err
	}
	var out []byte
	for len(out) < int(pub.DataSize) {
		r, err := tpm2.NVRead{
			AuthHandle: tpm2.AuthHandle{Handle: index, Name: rsp.NVName, Auth: tpm2.PasswordAuth(nil)},
			NVIndex:    tpm2.NamedHandle{Handle: index, Name: rsp.NVName},
			Size:       min(uint16(nvChunk), pub.DataSize-uint16(len(out))), Offset: uint16(len(out)),
		}.Execute(tpm)
		if err != nil {
			return nil, err
		}
		if len(r.Data.Buffer) == 0 {
			return nil, errors.New("NV read of nothing")
		}
		out = append(out, r.Data.Buffer...)
	}
	return out, nil
}

// readFacts asks the TPM what it is.
func readFacts(tpm transport.TPM) (f tpmFacts, err error) {
	get := func(p tpm2.TPMPT) (uint32, error) {
		rsp, err := tpm2.GetCapability{Capability: tpm2.TPMCapTPMProperties, Property: uint32(p), PropertyCount: 1}.Execute(tpm)
		if err != nil {
			return 0, err
		}
		l, err := rsp.CapabilityData.Data.TPMProperties()
		if err != nil {
			return 0, err
		}
		if len(l.TPMProperty) != 1 || l.TPMProperty[0].Property != p {
			return 0, fmt.Errorf("the TPM has no property %#x", uint32(p))
		}
		return l.TPMProperty[0].Value, nil
	}
	if f.manufacturer, err = get(tpm2.TPMPTManufacturer); err != nil {
		return f, err
	}
	if f.firmware, err = get(tpm2.TPMPTFirmwareVersion1); err != nil {
		return f, err
	}
	rev, err := get(tpm2.TPMPTRevision)
	f.revision = int(rev)
	return f, err
}

// checkIdentity refuses a TPM that is not the one of the inventory. The AK is enough: it is made
// from the platform seed, and nobody else can put a key at its handle.
func (d *Device) checkIdentity(tpm transport.TPM) error {
	_, name, err := readPublic(tpm, handleAK)
	if err != nil {
		return fmt.Errorf("read the AK: %w", err)
	}
	d.rec.mu.Lock()
	defer d.rec.mu.Unlock()
	switch {
	case name == nil:
		return fmt.Errorf("%w: the TPM has no AK, the inventory says it must: this is another TPM's state", ErrState)
	case !bytes.Equal(name, d.rec.AKName):
		return fmt.Errorf("%w: the TPM's AK is %x, the inventory's %x: this is another TPM's state", ErrState, name, d.rec.AKName)
	}
	if err := d.m.ca.issued(d.rec.EKCertificate); err != nil {
		return fmt.Errorf("%w: EK certificate: %w", ErrState, err)
	}
	return nil
}

// Manufactured waits until the vTPM has its identity and its background work is done.
func (d *Device) Manufactured(ctx context.Context) error {
	select {
	case <-d.manufactured:
		return d.mErr
	case <-ctx.Done():
		return ctx.Err()
	}
}
