package manager

import (
	"bytes"
	"context"
	"fmt"

	"github.com/google/go-tpm/tpm2"
	"github.com/google/go-tpm/tpm2/transport"
)

// An Identity says whose TPM it is: what a verifier needs to make a challenge.
type Identity struct {
	EKCertificate []byte   // DER, TCG EK Credential Profile
	Chain         [][]byte // DER, its issuers: the host's CA
	AK            []byte   // TPMT_PUBLIC (Part 2 §12.2.4)
	AKName        []byte   // Part 1 §16
}

// A PCR is a register's value.
type PCR struct {
	Bank  tpm2.TPMAlgID
	Index uint32
	Value []byte
}

// A Quote is what the TPM says of its registers, and what is needed to check it.
type Quote struct {
	Identity
	Attest    []byte // TPMS_ATTEST (Part 2 §10.12.12)
	Signature []byte // TPMT_SIGNATURE (Part 2 §11.3.4)
	PCRs      []PCR  // all that were selected, in the quote's order, as they were in that moment
	EventLog  []byte // the host's measurements, crypto-agile
}

// Identity waits for manufacture.
func (d *Device) Identity(ctx context.Context) (Identity, error) {
	if err := d.Manufactured(ctx); err != nil {
		return Identity{}, err
	}
	d.rec.mu.Lock()
	defer d.rec.mu.Unlock()
	return Identity{
		EKCertificate: bytes.Clone(d.rec.EKCertificate), Chain: [][]byte{d.m.CACertificate()},
		AK: bytes.Clone(d.rec.AK), AKName: bytes.Clone(d.rec.AKName),
	}, nil
}

// Selection selects registers of one bank.
func Selection(bank tpm2.TPMAlgID, pcrs ...uint) tpm2.TPMLPCRSelection {
	return tpm2.TPMLPCRSelection{PCRSelections: []tpm2.TPMSPCRSelection{
		{Hash: bank, PCRSelect: tpm2.PCClientCompatible.PCRs(pcrs...)},
	}}
}

// Quote has the TPM sign its registers of the selection together with the nonce, at most 64 bytes.
// It waits for manufacture.
func (d *Device) Quote(ctx context.Context, nonce []byte, sel tpm2.TPMLPCRSelection) (q Quote, err error) {
	if q.Identity, err = d.Identity(ctx); err != nil {
		return q, err
	}
	err = d.Host(ctx, func(tpm transport.TPM) error {
		rsp, err := tpm2.Quote{
			SignHandle:     d.ak(),
			QualifyingData: tpm2.TPM2BData{Buffer: nonce},
			InScheme:       tpm2.TPMTSigScheme{Scheme: tpm2.TPMAlgNull},
			PCRSelect:      sel,
		}.Execute(tpm)
		if err != nil {
			return err
		}
		q.Attest, q.Signature = rsp.Quoted.Bytes(), tpm2.Marshal(rsp.Signature)
		q.EventLog = bytes.Clone(d.log)
		q.PCRs, err = readPCRs(tpm, sel)
		return err
	})
	if err != nil {
		return q, fmt.Errorf("quote of guest %s: %w", d.rec.Guest, err)
	}
	return q, nil
}

// ak is the AK with its empty authorisation.
func (d *Device) ak() tpm2.AuthHandle {
	_, name := d.rec.identity()
	return tpm2.AuthHandle{Handle: handleAK, Name: tpm2.TPM2BName{Buffer: name}, Auth: tpm2.PasswordAuth(nil)}
}

// ReadPCRs reads registers.
func (d *Device) ReadPCRs(ctx context.Context, sel tpm2.TPMLPCRSelection) (pcrs []PCR, err error) {
	err = d.Host(ctx, func(tpm transport.TPM) error {
		pcrs, err = readPCRs(tpm, sel)
		return err
	})
	return pcrs, err
}

// readPCRs reads one register at a time: a TPM answers with as many of a longer selection as it
// likes (Part 3 §22.4).
func readPCRs(tpm transport.TPM, sel tpm2.TPMLPCRSelection) ([]PCR, error) {
	var out []PCR
	for _, s := range sel.PCRSelections {
		for i := range uint(8 * len(s.PCRSelect)) {
			if s.PCRSelect[i/8]&(1<<(i%8)) == 0 {
				continue
			}
			rsp, err := tpm2.PCRRead{PCRSelectionIn: Selection(s.Hash, i)}.Execute(tpm)
			if err != nil {
				return nil, fmt.Errorf("read PCR %d: %w", i, err)
			}
			if len(rsp.PCRValues.Digests) != 1 {
				return nil, fmt.Errorf("read PCR %d: the TPM has no such bank", i)
			}
			out = append(out, PCR{Bank: s.Hash, Index: uint32(i), Value: rsp.PCRValues.Digests[0].Buffer})
		}
	}
	return out, nil
}

// Activate answers a verifier's challenge (TPM2_ActivateCredential, Part 3 §12.5): credential is
// the TPMS_ID_OBJECT and secret the encrypted seed, each without its size. Only the TPM with the EK of
// the certificate can, and it does so only if the challenge is for its own AK. A guest that has
// set an endorsement password keeps the host from it.
func (d *Device) Activate(ctx context.Context, credential, secret []byte) (answer []byte, err error) {
	if err := d.Manufactured(ctx); err != nil {
		return nil, err
	}
	err = d.Host(ctx, func(tpm transport.TPM) error {
		return withEK(tpm, func(ek tpm2.NamedHandle, _ *tpm2.TPMTPublic) error {
			rsp, err := tpm2.ActivateCredential{
				ActivateHandle: d.ak(),
				KeyHandle: tpm2.AuthHandle{
					Handle: ek.Handle, Name: ek.Name, Auth: tpm2.Policy(tpm2.TPMAlgSHA256, 16, endorsement),
				},
				CredentialBlob: tpm2.TPM2BIDObject{Buffer: credential},
				Secret:         tpm2.TPM2BEncryptedSecret{Buffer: secret},
			}.Execute(tpm)
			if err != nil {
				return err
			}
			answer = rsp.CertInfo.Buffer
			return nil
		})
	})
	if err != nil {
		return nil, fmt.Errorf("activate credential of guest %s: %w", d.rec.Guest, err)
	}
	return answer, nil
}

// endorsement satisfies the EK's policy (EK Credential Profile §B.6.2, PolicyA).
func endorsement(tpm transport.TPM, session tpm2.TPMISHPolicy, nonce tpm2.TPM2BNonce) error {
	_, err := tpm2.PolicySecret{
		AuthHandle:    tpm2.AuthHandle{Handle: tpm2.TPMRHEndorsement, Auth: tpm2.PasswordAuth(nil)},
		PolicySession: session,
		NonceTPM:      nonce,
	}.Execute(tpm)
	return err
}
